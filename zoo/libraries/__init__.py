"""Backbones of other libraries than timm, by their names there: Hugging Face, open_clip, torchvision.

`names` reads names and knows which there are, without importing anything; `build` makes models, by
a file per library. What is built is run by the tower of its class, see `zoo.adapters`.
"""
