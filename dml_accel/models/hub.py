"""Folders on the Hugging Face Hub: downloaded where a folder is named, and pushed."""
