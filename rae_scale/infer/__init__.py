"""Pictures from trained models: text to image, reconstruction, labelled grids."""
