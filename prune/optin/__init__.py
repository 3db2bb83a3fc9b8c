"""OPTIN (Khaki and Plataniotis, ICLR 2024, arXiv:2403.17921): what masking one unit does to features and logits."""
