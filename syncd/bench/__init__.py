"""Measurements that users ask for, on their own machine: `syncd bench`."""
