"""Makes an account with credits and prints an API key of it: `account.py NAME CREDITS > key`.

Who asks is told by FRAMEWIRE_ADDRESS and FRAMEWIRE_API_KEY_FILE: an operator, at first `secrets/operator_key`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from framewire import client, errors


async def make(name: str, credits: int) -> str:
    """The key's secret, told once. Each call makes another account."""
    address = os.environ.get("FRAMEWIRE_ADDRESS") or "127.0.0.1:7700"
    beside = Path(__file__).parent / "secrets" / "operator_key"
    key_file = Path(os.environ.get("FRAMEWIRE_API_KEY_FILE") or beside)
    async with client.Client(address, key_file.read_text().strip()) as operator:
        account = await operator.create_account(name)
        await operator.grant(account.account_id, credits)
        key = await operator.create_api_key(account_id=account.account_id, display_name=name)
    print(f"account {account.account_id} has {credits} credits", file=sys.stderr)
    return key.secret


def main() -> None:
    if len(sys.argv) != 3 or not sys.argv[2].isdecimal():
        sys.exit("usage: account.py NAME CREDITS")
    try:
        print(asyncio.run(make(sys.argv[1], int(sys.argv[2]))))
    except (OSError, errors.FramewireError) as error:
        sys.exit(f"account.py: {error}")


if __name__ == "__main__":
    main()
