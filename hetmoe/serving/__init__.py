"""Requests served on described hardware: queues, batches, energy, and plans that change."""
