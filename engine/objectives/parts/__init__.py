"""What objectives are made of. Files of this folder are no objectives; all other files of the package are."""
