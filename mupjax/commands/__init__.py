"""The command line's commands: one module each, with one function of the command's name.

Imports of the package are inside the functions: ``mupjax --help`` must not wait for JAX.
"""
