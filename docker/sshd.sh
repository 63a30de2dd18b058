#!/usr/bin/env bash
# An ssh server in a container, so that a hostfile run can start processes in it. It runs as the image's user, lets in
# that user alone, and by key alone.
#
#   docker run --detach --gpus all --network host --ipc host -v "$PWD/ssh:/ssh:ro" rae-scale docker/sshd.sh
#
# RAE_SSH_PORT    port to listen on (default 2222, which docker/ssh_config names to the clients)
# RAE_SSH_KEYS    folder with authorized_keys (default /ssh)
set -euo pipefail

keys=${RAE_SSH_KEYS:-/ssh}
if [[ ! -r $keys/authorized_keys ]]; then
  echo "docker/sshd.sh: $keys/authorized_keys cannot be read; mount the folder with -v FOLDER:$keys:ro" >&2
  exit 2
fi

state=$(mktemp --directory)
ssh-keygen -q -t ed25519 -N '' -f "$state/host_key"

# A login starts with an empty environment; these say where this image has its programs and libraries.
passed=()
for name in PATH LD_LIBRARY_PATH LIBRARY_PATH CUDA_HOME PYTHONUNBUFFERED RAE_PYTHON RAE_COMMIT; do
  if [[ -n ${!name:-} ]]; then
    passed+=("\"$name=${!name}\"")
  fi
done

cat >"$state/sshd_config" <<END
Port ${RAE_SSH_PORT:-2222}
HostKey $state/host_key
AuthorizedKeysFile $keys/authorized_keys
# A mounted folder has the host's owner and mode, which say nothing here.
StrictModes no
PidFile $state/pid
AllowUsers $(id --user --name)
AuthenticationMethods publickey
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
X11Forwarding no
AllowTcpForwarding no
AllowAgentForwarding no
PrintMotd no
SetEnv ${passed[*]}
END
exec /usr/sbin/sshd -D -e -f "$state/sshd_config"
