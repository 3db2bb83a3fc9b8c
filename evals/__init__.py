"""One file a metric, the measuring harness, the report. Sees two models and a bundle."""
