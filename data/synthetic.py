"""What sources of made-up samples share: a bundle over tensors in memory."""

from collections.abc import Sequence

from data.base import Batch, Classification, DataBundle, TensorBatches, calibration_batches, fingerprint_of


def synthetic_bundle(
    name: str, classes: int, train: Batch, validation: Batch, *, batch_size: int, calibration: tuple[int, int],
    seed: int, notes: Sequence[str] = (),
) -> DataBundle:  # fmt: skip
    """A bundle for classifying made-up samples.

    Args:
        name: Short name for folders and reports.
        classes: Number of labels.
        train: Training samples: `inputs` (N, T, D) and `labels` (N,).
        validation: The same for validation.
        batch_size: Samples per training and validation batch.
        calibration: Calibration batches drawn from train, and samples in each.
        seed: Seeds the order of training and the calibration sample.
        notes: What a reader should know of the samples.
    """
    drawn = calibration_batches(train, *calibration, seed)
    return DataBundle(
        name=name,
        domain="synthetic",
        task=Classification(classes),
        calibration=drawn,
        train=TensorBatches(train, batch_size, shuffle_seed=seed),
        train_samples=len(train["labels"]),
        validation=TensorBatches(validation, batch_size),
        example={"inputs": validation["inputs"][:1]},
        fingerprints={
            "train": fingerprint_of(*train.values(), batch_size, seed),
            "calibration": fingerprint_of(*(t for batch in drawn for t in batch.values())),
            "validation": fingerprint_of(*validation.values(), batch_size),
        },
        notes=notes,
    )
