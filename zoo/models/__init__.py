"""The wirings that join parts into models."""
