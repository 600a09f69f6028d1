#!/bin/sh
# Shows a run in a browser while it goes on: serves the folder of the run, with dev/watch.html in
# it, to this machine only.
#   dev/watch.sh RUN [PORT]      make watch RUN=runs/first calls it; ends with Ctrl-C
RUN=${1:?the --out folder of a run} PORT=${2:-8000} PYTHON=${PYTHON:-python3}
[ -d "$RUN" ] || {
    echo "error: $RUN is no folder, hint: RUN=... names the --out folder of a run" >&2
    exit 1
}
command -v "$PYTHON" > /dev/null || {
    echo "error: no $PYTHON to serve the page with," \
        "hint: sh dev/curve.sh $RUN draws the loss as text" >&2
    exit 1
}
cp "$(dirname "$0")/watch.html" "$RUN/watch.html" || exit 1
echo "http://localhost:$PORT/watch.html     (on another machine:" \
    "ssh -L $PORT:localhost:$PORT ...; Ctrl-C ends it)"
exec "$PYTHON" -m http.server "$PORT" --bind 127.0.0.1 --directory "$RUN" > /dev/null 2>&1
