"""Projects that use groma as a library."""
