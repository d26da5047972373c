"""From a backbone to boxes and masks: ViTDet Mask R-CNN and Cascade Mask R-CNN."""
