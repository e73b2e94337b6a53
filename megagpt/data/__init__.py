"""Token files in, batches out: the indexed format, samples, their order, blends, loaders."""
