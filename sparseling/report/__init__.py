"""Run reports: a run folder in, one self-contained HTML page out (`build.write_report`), and TensorBoard events (`tensorboard.Events`)."""
