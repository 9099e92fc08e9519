"""Look the pinned packages up in the database of known vulnerabilities; say which could not be looked up.

pip-audit by itself ends with "No known vulnerabilities found" and success also where it looked up nothing.
Exit code 1: a pinned package has a known vulnerability. 3: none of them could be looked up, which
--may-be-offline, for a machine without that database, makes a remark.
"""

import json
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).parents[1] / "constraints.txt"


def main() -> int:
    """Run pip-audit on constraints.txt and report."""
    nothing = 0 if "--may-be-offline" in sys.argv[1:] else 3
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
    done = subprocess.run([*command, "--format", "json", "-r", str(PINS)], capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"Not audited: pip-audit ended with\n{done.stderr.strip()}")
        return nothing
    unknown = [package for package in packages if "skip_reason" in package]
    bad = [(package, found) for package in packages for found in package.get("vulns", ())]
    for package, found in bad:
        fixed = ", ".join(found["fix_versions"]) or "no version"
        print(f"{package['name']} {package['version']}: {found['id']}, mended in {fixed}")
    audited = len(packages) - len(unknown)
    print(f"{audited} of {len(packages)} pinned packages audited, {len(bad)} known vulnerabilities in them.")
    if unknown:
        print("NOT AUDITED, no data:", ", ".join(package["name"] for package in unknown))
    return 1 if bad else 0 if audited else nothing


if __name__ == "__main__":
    sys.exit(main())
