"""The process and its machine: device, terminal, signals, files, random states, the Hub, torchrun's environment.

Nothing here depends on models, data or configuration groups.
"""
