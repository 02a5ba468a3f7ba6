"""The test run checks the shapes and types of every method's tensors at every call."""

from jaxtyping import install_import_hook

install_import_hook("fairtrial.methods", "beartype.beartype")
