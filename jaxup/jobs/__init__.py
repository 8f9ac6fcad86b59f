"""What `jaxup.train` carries out: one module for each kind of experiment."""
