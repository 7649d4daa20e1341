"""Packaging of nepa_mm; nepa_mm/compat/stack.py states the requirements."""
import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r"^__version__ = '(.+)'$", (ROOT / 'nepa_mm/__init__.py').read_text(), re.M)[1]
STACK = runpy.run_path(str(ROOT / 'nepa_mm/compat/stack.py'))

setup(
    name='nepa-mm',
    version=VERSION,
    description='Next-Embedding Prediction (NEPA) for OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    py_modules=['nepa_mm_cli'],     # stands beside the package, see there
    packages=find_packages(include=['nepa_mm', 'nepa_mm.*']),
    # .mim holds links to configs, tools and model-index.yml; a wheel contains the files
    package_data={'nepa_mm': [
        'visualization/explore.html',
        *(f'.mim/{pattern}' for pattern in (
            'model-index.yml', 'configs/**/*.py', 'configs/**/*.yml', 'configs/**/*.md',
            'tools/**/*.py', 'tools/*.sh'))]},
    install_requires=list(STACK['CORE'].values()),
    extras_require=dict(
        mm=list(STACK['CURRENT'].values()),
        openmmlab=[*STACK['CLASSIC'].values(),
                   'setuptools>=77,<82',    # mmengine uses pkg_resources
                   'ftfy', 'regex'],        # imported by mmsegmentation, but not required by it
        export=['onnx', 'onnxruntime', 'onnxscript'],
        parquet=['pyarrow'],
        test=['matplotlib', 'pyarrow', 'pytest', 'pytest-xdist>=3.2', 'ruff', 'scikit-learn',
              'selenium', 'setuptools>=77', 'tensorboard']),
)
