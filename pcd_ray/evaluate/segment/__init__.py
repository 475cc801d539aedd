"""Semantic segmentation: linear probe on the frozen map, FCN fine-tuning, mIoU."""
