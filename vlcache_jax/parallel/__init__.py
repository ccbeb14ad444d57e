"""Several devices: meshes, what lies where, and the ops as each device runs them."""
