"""Pictures to arrays: resizing, cropping, augmentation, the cut into patches."""
