"""How a machine is made and its guest put in, for each thing that a guest can run on."""
