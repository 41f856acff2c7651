"""From text to training samples: tokenizers, indexed corpora, blends, and a sample stream whose position is one number."""
