# SPDX-License-Identifier: Apache-2.0
"""What setup.cfg cannot say: the scripts of tools/ are installed as ``megatron_cream.tools``."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["megatron_cream*"]), "megatron_cream.tools"],
    package_dir={"megatron_cream.tools": "tools"},
)
