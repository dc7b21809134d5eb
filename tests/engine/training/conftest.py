"""These tests train in this process too."""

from process_group import process_group_of_one

__all__ = ["process_group_of_one"]
