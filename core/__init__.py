"""What every stage stands on: configuration, images, the ViT, the engine, checkpoints. Knows nothing of any task."""
