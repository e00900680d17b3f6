"""The front process as a whole: what it may import, and how it is put together."""

import subprocess
import sys


def test_the_front_imports_neither_torch_nor_transformers():
    modules = "app, cli, lifecycle, served, engine, openapi"
    code = (
        f"import sys; from plaudit_server import {modules}; openapi.document(app.published_routes()); "
        "heavy = {'torch', 'transformers', 'onnxruntime'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
