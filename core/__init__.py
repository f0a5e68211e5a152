"""What server, workers and cli share: rules, rows, files, queue. No web, no tensors."""
