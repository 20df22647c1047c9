"""Backbones of Hugging Face, open_clip and torchvision, by their names there.

`names` reads names and knows which there are, without importing anything; `build` makes models, by
a file per library. What is built is run by the tower of its class, see `zoo.adapters`.
"""
