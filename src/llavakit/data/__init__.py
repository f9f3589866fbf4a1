"""Data: files to checked records, records to samples, samples to batches; see docs/data.md."""
