-- Take or renew the leader's lease.
-- KEYS[1] leader (hash: id, term)   KEYS[2] term counter
-- ARGV[1] own id   ARGV[2] lease in ms   ARGV[3] term held, 0 for none
-- Returns the term held from now on, or 0: somebody else leads, or the own lease ran out.
local held = redis.call('HMGET', KEYS[1], 'id', 'term')
if held[1] then
  if held[1] ~= ARGV[1] or held[2] ~= ARGV[3] then return 0 end
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return tonumber(held[2])
end
if ARGV[3] ~= '0' then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local term = math.max(tonumber(redis.call('GET', KEYS[2]) or 0) + 1, now)
redis.call('SET', KEYS[2], string.format('%.0f', term))
redis.call('HSET', KEYS[1], 'id', ARGV[1], 'term', string.format('%.0f', term))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return term
