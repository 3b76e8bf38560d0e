"""Readers, prompts, images and the loader: files on disk to batches."""
