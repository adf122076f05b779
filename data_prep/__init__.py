"""Offline data preparation: the drawn micro-world and the tools that write records. nanopatho/ never imports it."""
