#!/usr/bin/env bash
# The same from a shell that can open TCP: search.sh HOST PORT TOKEN DATASET '[1, 0, 0]', with SYNCD_LISTEN and SYNCD_TOKEN set for syncd serve.
set -euo pipefail
exec 3<>"/dev/tcp/$1/$2"
printf '{"jsonrpc":"2.0","id":1,"method":"authenticate","params":{"token":"%s"}}\n' "$3" >&3
printf '{"jsonrpc":"2.0","id":2,"method":"search","params":{"dataset":"%s","vector":%s,"k":2,"consistency":"strong"}}\n' "$4" "$5" >&3
read -r _ <&3
read -r answer <&3
echo "$answer"
