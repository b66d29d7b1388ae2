-- Tell the time, which server process tells it, what is added to that, and what the others say should be added.
-- KEYS[1] clock (hash: run id of a server -> microseconds)
-- KEYS[2] claims (hash: host -> "microseconds between TIME and the time it lives by : TIME when it said so")
-- ARGV[1] host that asks   ARGV[2] the time that it lives by, unix microseconds; '' while it has none
-- Returns seconds, microseconds, run id ('' where a server has none), what is added ('' where nothing is agreed on), and
-- the median of what other hosts claim ('' where no other host said so within 3 s; for who has no time, its own host's
-- claim counts as well).
local FRESH_US, KEPT_US, SAME_US, AGAIN_US = 3000000, 60000000, 1000, 1000000
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local run_id = string.match(redis.call('INFO', 'server'), 'run_id:(%w*)') or ''
local claim_us = tonumber(ARGV[2]) and ARGV[2] - now_us
local said = false
local others = {}
local claims = redis.call('HGETALL', KEYS[2])
for i = 1, #claims, 2 do
  local host, us, at_us = claims[i], string.match(claims[i + 1], '^(-?%d+):(%d+)$')
  local age_us = math.abs(now_us - (at_us or 0)) -- TIME may have jumped either way since
  if age_us > KEPT_US then
    redis.call('HDEL', KEYS[2], host)
  elseif age_us <= FRESH_US and host == ARGV[1] and claim_us then
    said = math.abs(us - claim_us) < SAME_US and age_us < AGAIN_US
  elseif age_us <= FRESH_US then
    table.insert(others, tonumber(us))
  end
end
if claim_us and not said then
  redis.call('HSET', KEYS[2], ARGV[1], string.format('%.0f:%.0f', claim_us, now_us))
end
table.sort(others)
local median = others[math.ceil(#others / 2)]
local added = redis.call('HGET', KEYS[1], run_id)
return {time[1], time[2], run_id, added or '', median and string.format('%.0f', median) or ''}
