// @discordjs/voice under discord.js, led by lines of JSON: commands on standard input, what happens on the output.
//
// Runs with the packages of `package-lock.json` beside it, with nothing of this repository.

import { createReadStream } from 'node:fs';
import { createInterface } from 'node:readline';

import {
  AudioPlayerStatus,
  EndBehaviorType,
  StreamType,
  VoiceConnectionStatus,
  createAudioPlayer,
  createAudioResource,
  entersState,
  joinVoiceChannel,
} from '@discordjs/voice';
import { Client, Events, GatewayIntentBits } from 'discord.js';

const JOIN_TIMEOUT_MS = 5_000;

const tell = (event, fields = {}) => process.stdout.write(`${JSON.stringify({ event, ...fields })}\n`);

const [token, api] = process.argv.slice(2);
const client = new Client({
  intents: [GatewayIntentBits.Guilds, GatewayIntentBits.GuildVoiceStates],
  rest: { api: api.replace(/\/v\d+$/, ''), version: '10' },
});
const player = createAudioPlayer();
const frames = new Map();
let connection;

// The receiver gives streams by user: one is opened for each user when a packet of theirs is first told of. Who speaks
// without a pause is told of once, and that may have been before anybody asked.
function listen(receiver) {
  const open = (user) => {
    if (receiver.subscriptions.has(user)) return;
    const stream = receiver.subscribe(user, { end: { behavior: EndBehaviorType.Manual } });
    if (!frames.has(user)) frames.set(user, []);
    stream.on('data', (frame) => frames.get(user).push(frame.toString('base64')));
    stream.on('error', (error) => process.stderr.write(`receiver: ${error}\n`));
  };
  receiver.speaking.on('start', open);
  for (const user of receiver.speaking.users.keys()) open(user);
}

function session() {
  const state = connection.state.networking?.state;
  return state?.dave?.session;
}

const actions = {
  async join({ guild, channel }) {
    const adapterCreator = client.guilds.cache.get(guild).voiceAdapterCreator;
    connection = joinVoiceChannel({ guildId: guild, channelId: channel, adapterCreator, selfDeaf: false });
    connection.on('error', (error) => process.stderr.write(`connection: ${error}\n`));
    connection.on('debug', (message) => process.stderr.write(`${message}\n`));
    connection.on('stateChange', (before, after) => process.stderr.write(`${before.status} -> ${after.status}\n`));
    connection.subscribe(player);
    await entersState(connection, VoiceConnectionStatus.Ready, JOIN_TIMEOUT_MS);
    tell('joined');
  },
  async play({ file }) {
    player.play(createAudioResource(createReadStream(file), { inputType: StreamType.OggOpus }));
    await entersState(player, AudioPlayerStatus.Playing, JOIN_TIMEOUT_MS);
    tell('playing');
  },
  async listen() {
    listen(connection.receiver);
    tell('listening');
  },
  async heard() {
    tell('heard', { frames: Object.fromEntries(frames), code: session()?.voicePrivacyCode ?? null });
  },
  async leave() {
    player.stop(true);
    connection.destroy();
    tell('left');
  },
};

player.on('error', (error) => process.stderr.write(`player: ${error}\n`));
player.on(AudioPlayerStatus.Idle, () => tell('played'));
client.once(Events.ClientReady, () => tell('ready', { user: client.user.id }));
await client.login(token);
for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  try {
    await actions[command.do](command);
  } catch (error) {
    tell('failed', { error: String(error) });
  }
}
await client.destroy();
