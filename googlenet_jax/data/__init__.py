"""Images: data sets, batches, training samples and crops."""
