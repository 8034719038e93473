"Everything comes from settings.ini, the one place where names and pins stand."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser()
config.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    license="Apache-2.0",
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    python_requires=f">={cfg['min_python']},<3.12",
    install_requires=cfg["requirements"].split(),
    extras_require={"run": cfg["run_requirements"].split(), "dev": cfg["dev_requirements"].split()},
)
