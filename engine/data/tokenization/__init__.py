"""Text to ids: tokenizers, loaded or trained."""
