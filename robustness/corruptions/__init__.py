"""The corruptions of ImageNet-C as functions of images and draws; `apply.corrupt` is the way in."""
