-- Carry out the leader's changes, all or none: only while the lease of that term is held.
-- KEYS[1] leader   KEYS[2..] every key that a change names
-- ARGV[1] own id   ARGV[2] own term
-- ARGV[3] JSON list of changes, each [command, number of its key within KEYS, argument, ...]; arguments are strings
-- Returns 1, or 0: not the leader, nothing was changed.
local held = redis.call('HMGET', KEYS[1], 'id', 'term')
if held[1] ~= ARGV[1] or held[2] ~= ARGV[2] then return 0 end
for _, change in ipairs(cjson.decode(ARGV[3])) do
  redis.call(change[1], KEYS[change[2]], unpack(change, 3))
end
return 1
