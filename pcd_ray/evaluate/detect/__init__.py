"""Mask R-CNN and Faster R-CNN on a backbone; COCO data, box and mask AP."""
