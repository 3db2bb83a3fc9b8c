"""One file a tracker: where a run is logged beside its own folder."""
