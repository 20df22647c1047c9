"""What is measured on tensors and models; nothing here knows Hydra."""
