// Command disgo-peer has disgo's voice connections in many guilds at once, all of them with the same Opus frames.
//
//	disgo-peer FRAMES
//
// FRAMES is a file of Opus frames of 20 ms, each after its length (u16, big endian). Voice credentials come as one line
// of JSON on standard input; the program ends when that does.
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"sync"
	"time"

	"github.com/disgoorg/disgo/discord"
	"github.com/disgoorg/disgo/gateway"
	"github.com/disgoorg/disgo/voice"
	"github.com/disgoorg/snowflake/v2"
)

const (
	joinsAtOnce = 8
	joinWithin  = 20 * time.Second
)

type credentials struct {
	Guild     snowflake.ID `json:"guild"`
	Channel   snowflake.ID `json:"channel"`
	UserID    snowflake.ID `json:"user_id"`
	SessionID string       `json:"session_id"`
	Token     string       `json:"token"`
	Endpoint  string       `json:"endpoint"`
}

// loop provides the frames that all guilds share, over and over.
type loop struct {
	frames [][]byte
	next   int
}

func (l *loop) ProvideOpusFrame() ([]byte, error) {
	frame := l.frames[l.next]
	l.next = (l.next + 1) % len(l.frames)
	return frame, nil
}

func (l *loop) Close() {}

func readFrames(path string) ([][]byte, error) {
	rest, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var frames [][]byte
	for len(rest) > 0 {
		length := binary.BigEndian.Uint16(rest)
		frames = append(frames, rest[2:2+length])
		rest = rest[2+length:]
	}
	return frames, nil
}

// join connects to one voice server. The main gateway is left out: its two events are answered from the credentials.
func join(call credentials, frames [][]byte) error {
	var conn voice.Conn
	update := func(_ context.Context, guild snowflake.ID, channel *snowflake.ID, _ bool, _ bool) error {
		state := discord.VoiceState{
			GuildID: guild, ChannelID: channel, UserID: call.UserID, SessionID: call.SessionID,
		}
		conn.HandleVoiceStateUpdate(gateway.EventVoiceStateUpdate{VoiceState: state})
		if channel != nil {
			conn.HandleVoiceServerUpdate(gateway.EventVoiceServerUpdate{
				Token: call.Token, GuildID: guild, Endpoint: &call.Endpoint,
			})
		}
		return nil
	}
	conn = voice.NewConn(call.Guild, call.UserID, update, func() {})
	within, cancel := context.WithTimeout(context.Background(), joinWithin)
	defer cancel()
	if err := conn.Open(within, call.Channel, false, true); err != nil {
		return err
	}
	conn.SetOpusFrameProvider(&loop{frames: frames})
	return nil
}

func run(path string) error {
	frames, err := readFrames(path)
	if err != nil {
		return err
	}
	ledBy := bufio.NewReader(os.Stdin)
	line, err := ledBy.ReadBytes('\n')
	if err != nil {
		return err
	}
	var calls []credentials
	if err := json.Unmarshal(line, &calls); err != nil {
		return err
	}
	var joins sync.WaitGroup
	turns := make(chan struct{}, joinsAtOnce)
	failed := make(chan error, len(calls))
	joins.Add(len(calls))
	for _, call := range calls {
		go func() {
			defer joins.Done()
			turns <- struct{}{}
			defer func() { <-turns }()
			failed <- join(call, frames)
		}()
	}
	joins.Wait()
	close(failed)
	for each := range failed {
		err = errors.Join(err, each)
	}
	if err != nil {
		return err
	}
	fmt.Println("playing")
	_, err = io.Copy(io.Discard, ledBy)
	return err
}

func main() {
	if len(os.Args) != 2 {
		log.Fatal("usage: disgo-peer FRAMES")
	}
	if err := run(os.Args[1]); err != nil {
		log.Fatal(err)
	}
}
