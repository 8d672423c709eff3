"""What every test shares: a Hub client that cannot see this machine's cache, token or network settings, and Ctrl-C."""

import os
import signal
import tempfile

# huggingface_hub reads these when it is first imported, so they are set before any test module can import it.
_home = tempfile.TemporaryDirectory(prefix="int8cli-hf-home-")
for _name in (
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
):
    os.environ.pop(_name, None)
os.environ["HF_HOME"] = _home.name
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# A shell gives what it runs in the background an ignored SIGINT, and every process started from there with it.
signal.signal(signal.SIGINT, signal.default_int_handler)
