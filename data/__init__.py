"""One file a data source: calibration, train and validation batches."""
