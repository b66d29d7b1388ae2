-- Draw terms from the one counter, for the leader only.
-- KEYS[1] leader   KEYS[2] term counter
-- ARGV[1] own id   ARGV[2] own term   ARGV[3] how many
-- Returns the first of that many consecutive terms, or 0: not the leader.
local held = redis.call('HMGET', KEYS[1], 'id', 'term')
if held[1] ~= ARGV[1] or held[2] ~= ARGV[2] then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local first = math.max(tonumber(redis.call('GET', KEYS[2]) or 0) + 1, now)
redis.call('SET', KEYS[2], string.format('%.0f', first + ARGV[3] - 1))
return first
