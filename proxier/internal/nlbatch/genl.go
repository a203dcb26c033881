package nlbatch

import (
	"context"
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// GenericFamily finds the number of a generic netlink family. The error wraps
// unix.ENOENT if the kernel does not have it.
func (c *Conn) GenericFamily(ctx context.Context, name string) (uint16, error) {
	var id uint16
	err := c.Query(ctx, func(e *Encoder) {
		e.Begin(unix.GENL_ID_CTRL, 0)
		e.Raw(unix.CTRL_CMD_GETFAMILY, 1, 0, 0)
		e.String(unix.CTRL_ATTR_FAMILY_NAME, name)
	}, func(payload []byte) error {
		for a, v := range Attributes(payload[min(unix.GENL_HDRLEN, len(payload)):]) {
			if a == unix.CTRL_ATTR_FAMILY_ID && len(v) >= 2 {
				id = binary.NativeEndian.Uint16(v)
			}
		}
		return nil
	})
	if err == nil && id == 0 {
		err = unix.ENOENT
	}
	if err != nil {
		return 0, fmt.Errorf("find generic netlink family %s: %w", name, err)
	}
	return id, nil
}
