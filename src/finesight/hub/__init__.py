"""Downloads and uploads: Hugging Face, ModelScope and object storage."""
