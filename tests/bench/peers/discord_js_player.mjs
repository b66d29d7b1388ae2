// @discordjs/voice in many guilds at once: one AudioPlayer to which the connections of all guilds are subscribed.
//
//     node discord_js_player.mjs FRAMES
//
// FRAMES is a file of Opus frames of 20 ms, each after its length (u16, big endian). Voice credentials come as one line
// of JSON on standard input; the program ends when that does. Runs with the packages of `tests/interop/package-lock.json`
// beside it, with nothing of this repository.

import { readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { Readable } from 'node:stream';

import {
  NoSubscriberBehavior,
  StreamType,
  VoiceConnectionStatus,
  createAudioPlayer,
  createAudioResource,
  entersState,
  joinVoiceChannel,
} from '@discordjs/voice';

const JOINS_AT_ONCE = 8;
const JOIN_WITHIN_MS = 20_000;

function readFrames(path) {
  const bytes = readFileSync(path);
  const frames = [];
  for (let at = 0; at < bytes.length; at += 2 + bytes.readUInt16BE(at)) {
    frames.push(bytes.subarray(at + 2, at + 2 + bytes.readUInt16BE(at)));
  }
  return frames;
}

function* endless(frames) {
  for (;;) yield* frames;
}

// Stands for the main gateway: asked to join, it hands out the credentials.
function gatewayFor(call) {
  return (methods) => ({
    sendPayload({ d }) {
      if (d.channel_id === null) return true;
      queueMicrotask(() => {
        methods.onVoiceStateUpdate({
          guild_id: call.guild,
          channel_id: call.channel,
          user_id: call.user_id,
          session_id: call.session_id,
        });
        methods.onVoiceServerUpdate({ guild_id: call.guild, token: call.token, endpoint: call.endpoint });
      });
      return true;
    },
    destroy() {},
  });
}

async function join(call, player) {
  const connection = joinVoiceChannel({
    guildId: call.guild,
    channelId: call.channel,
    adapterCreator: gatewayFor(call),
  });
  connection.on('error', (error) => process.stderr.write(`connection: ${error}\n`));
  await entersState(connection, VoiceConnectionStatus.Ready, JOIN_WITHIN_MS);
  connection.subscribe(player);
}

const frames = readFrames(process.argv[2]);
const player = createAudioPlayer({ behaviors: { noSubscriber: NoSubscriberBehavior.Play } });
player.on('error', (error) => process.stderr.write(`player: ${error}\n`));
player.play(createAudioResource(Readable.from(endless(frames)), { inputType: StreamType.Opus }));

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const waiting = JSON.parse((await lines.next()).value);
async function joinAll() {
  for (let call = waiting.pop(); call; call = waiting.pop()) await join(call, player);
}
await Promise.all(Array.from({ length: JOINS_AT_ONCE }, joinAll));
process.stdout.write('playing\n');
await lines.next();
process.exit(0); // without a farewell to every server
